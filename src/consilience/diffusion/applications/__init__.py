"""What few-step models are used for besides pictures: control, speech, detection; small, on the same code."""
