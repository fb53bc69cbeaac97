"""Predict memory and communication of a training before it is launched."""
