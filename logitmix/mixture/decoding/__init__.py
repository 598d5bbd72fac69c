"""Drawing the tokens of a mixture in fewer passes of its members than joint decoding takes."""
