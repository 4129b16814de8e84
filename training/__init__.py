"""How the embedded model was made: drawn scenes, a judge, and the training script. Not part of the package."""
