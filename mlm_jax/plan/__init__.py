"""Will it fit, how fast, at what price: a train step compiled ahead of time for TPUs that are not there."""
