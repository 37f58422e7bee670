"""The bundled miniature model: vocabulary, captions, judge network and weights."""
