"""Images with damage in every field of every structure, and what becomes of those who open them."""
