"""The learner: hindsight-hinted teacher, unhinted student, staleness-corrected objective."""
