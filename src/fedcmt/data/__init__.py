"""Images: generated cohorts for the demo and the tests, and checks of raw datasets before training."""
