"""The playground: a page for people."""
