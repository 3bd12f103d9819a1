"""What goes over the wire, client side."""
