"""What turns parameters into named figures, during training and after it."""
