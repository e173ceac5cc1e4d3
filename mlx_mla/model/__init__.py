"""What a model is: configuration, attention, weights, cost, and the files that travel with it."""
