"""What training did to a model's matrices: what it forgot, how close to a stationary point it ended, what collapsed."""
