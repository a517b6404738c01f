"""Where evoprune meets other programs. Each module needs an extra of its own, and nothing else imports it."""
