"""Tables, tars, folders and pictures, read row by row."""
