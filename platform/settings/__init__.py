"""Settings of trials and searches, and the words for what comes out of them."""
