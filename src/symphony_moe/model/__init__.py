"""What a dense model and a Mixture-of-Experts model are made of."""
