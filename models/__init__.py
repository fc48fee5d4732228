"""Networks: pictures to integer symbols and table indexes, and back. No bytes, no files, no options."""
