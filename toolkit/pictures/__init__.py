"""Drawing results on images and videos."""
