from attnzoo.testing import parametrize_with_checks

from attnzoo_wavelets import Haar, Subband


@parametrize_with_checks([Haar, Subband])
def test_conformance(check):
    check()
