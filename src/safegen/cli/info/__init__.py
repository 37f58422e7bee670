"""Commands about the package itself: what there is, what it needs, and whether it works here."""
