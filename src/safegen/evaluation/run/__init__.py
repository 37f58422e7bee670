"""Generate, judge and verify the images of a protocol in a run folder."""
