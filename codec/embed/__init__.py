"""The codec inside other people's pipelines, one module for each; nothing of theirs is imported before it is used."""
