"""What runs at a site: its data, one round's work, the Flower ClientApp."""
