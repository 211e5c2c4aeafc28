"""What a user could take in place of DMC: each is one small dataclass that reads a text with a plain model."""
