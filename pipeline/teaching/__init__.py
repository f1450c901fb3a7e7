"""What stage one shares: a shard of images through the teacher, rows, labels made of its tokens, Dask."""
