"""What comes after compression: the model in the form of the place where it is run."""
