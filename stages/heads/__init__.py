"""Linear heads: logistic regression and the choice of its strength."""
