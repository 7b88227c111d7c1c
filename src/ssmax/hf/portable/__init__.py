"""What a saved model contains so that others can load and judge it: its code file and its model card."""
