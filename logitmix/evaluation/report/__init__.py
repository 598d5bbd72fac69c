"""Tables, figures and pages, from the files that evaluation and training wrote."""
