from attnzoo.testing import parametrize_with_checks

from attnzoo_template import Template


@parametrize_with_checks([Template])
def test_conformance(check):
    check()
