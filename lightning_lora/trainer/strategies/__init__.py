"""What differs between Lightning's strategies: one layout for each."""
