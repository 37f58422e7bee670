"""How the miniature model was trained, from nothing: a tool, run by `python -m safegen.mini.train`.

The library never imports it.
"""
