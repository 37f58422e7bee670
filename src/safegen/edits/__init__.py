"""Methods that change a model's weights so that it no longer draws a concept."""
