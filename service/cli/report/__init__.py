"""`heatlens report`: the audit of a classifier on labelled images."""
