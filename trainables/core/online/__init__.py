"""Parts of online self-training: labels of a teacher in every step, and what training images are made of them."""
