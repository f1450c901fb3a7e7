"""Language-supervised segmentation without a language model at test time: the stages and what they share."""
