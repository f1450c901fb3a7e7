"""What the stages hand to one another: arrays in Zarr v3, a ledger of finished shards, manifests.

Reading order: schema (the arrays), store (the door to zarr), ledger (what is done), verify.
"""
