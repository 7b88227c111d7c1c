"""What a saved model carries so that others can load and judge it: its code file and its model card."""
