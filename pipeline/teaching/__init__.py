"""Stage one: a shard of images through the teacher, and labels made of its tokens."""
