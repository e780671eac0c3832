"""What the course shows beside its text: pictures of concepts, drawn from numbers."""
