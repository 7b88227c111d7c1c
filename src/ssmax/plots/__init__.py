"""What all reports share: choosing rows, drawing, and a page that opens offline. Loads no torch."""
