"""Ground floor: errors, registry, files, hashes and settings. Imports no torch."""
