"""Video: frames to packets to files and back. Formats in docs/FORMAT.md, use in docs/VIDEO.md."""
