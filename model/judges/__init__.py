"""What is thought of prompts and pictures: measures, block-lists, CLIP score, safety checker."""
