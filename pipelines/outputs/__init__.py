"""The files of a dataset: who may write them, how they appear, what is in them."""
