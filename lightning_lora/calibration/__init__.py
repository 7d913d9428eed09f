"""From calibration data to starts: statistics of the adapted layers, factors, and ranks under a budget."""
