"""Networks that mask their gradients, honest ones beside them, and what an audit says of each."""
