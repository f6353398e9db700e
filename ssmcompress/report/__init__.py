"""One page that shows what was done to models and what it cost; the only home of templates and plots."""
