"""Files of a saved model with which others can load and judge it: its code and its model card."""
