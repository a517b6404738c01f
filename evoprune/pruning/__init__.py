"""The building blocks of pruning methods: functions and frozen dataclasses that know no method and no model."""
