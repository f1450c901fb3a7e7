"""This repository's proof beside the product: many runs of one config, their tables, and what was measured."""
