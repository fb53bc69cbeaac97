"""What the lessons that train on images share: the data sets and the networks."""
