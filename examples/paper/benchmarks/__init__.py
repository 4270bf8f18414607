"""Speed of the laboratory against its peers."""
